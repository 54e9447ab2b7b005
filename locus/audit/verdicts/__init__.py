"""From figures to answers: forgotten, spared, hidden, coming back."""
