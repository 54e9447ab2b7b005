"""An MLP as keys and values: where to read keys, what value to write, and least squares."""
