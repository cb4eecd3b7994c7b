"""What each expert of a mixture of experts does: which tokens reach it, what it gets, and what it gives.

In: the experts of one layer for one batch, as `watch` sees them in the forward pass. Out: a routing table that is stored with
the activations (`table`), sums over tokens that can't be stored (`sums`), and the totals of a study (`totals`).
Start with `routed`. An expert that no token reached is unknown, never 0.
"""
