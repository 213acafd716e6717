"""One class a training mode: a batch in, model inputs and targets out."""
