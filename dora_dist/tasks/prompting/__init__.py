"""How a model is asked for a text of its own: from what a person types, or a record holds, to the input of training."""
