"""The laws: one parametrised test each, over every method, chain and codec of `cases`."""
