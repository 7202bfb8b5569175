"""bnexp answers what batch normalization does to a network, with evidence."""
