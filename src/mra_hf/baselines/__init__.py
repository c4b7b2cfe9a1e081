"""Other ways to approximate softmax attention, to compare MRA-2 with."""
