"""One layer's mathematics: adapted linear layers, row norms, components, PEFT's format. Imports no engine."""
