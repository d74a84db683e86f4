"""How much numbers vary when nothing is wrong, and the bounds that follow."""
