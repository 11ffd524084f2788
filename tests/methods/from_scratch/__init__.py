"""Every method once more as one plain loop, from its paper, importing nothing from lamina: what parity is tested with.

A loop takes a model (its weights are where round 0 starts), the clients' data as a list of (x, y), and settings; it
returns the state dict of the global model after every round.
"""
