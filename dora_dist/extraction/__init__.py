"""Features of pictures and of videos' frames, by a frozen vision tower, into files that VL-BART trains on."""
