"""The process and its ranks: launchers, rendezvous, watch, signals, console, exit codes."""
