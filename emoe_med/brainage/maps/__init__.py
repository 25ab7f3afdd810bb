"""Maps of the experts: which expert handles which part of the brain, and whether that means anything.

Axis letters: N heads, C cells of the routed layer's map, K slots, E experts, P parcels.
"""
