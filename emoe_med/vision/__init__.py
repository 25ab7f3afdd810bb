"""Image classification with a vision transformer and routed layers: datasets, training, evaluation."""
