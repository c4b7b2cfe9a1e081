"""Other approximations of softmax attention, to compare MRA-2 with."""
