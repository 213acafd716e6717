"""One class a regularizer: extra forwards and the loss they add."""
