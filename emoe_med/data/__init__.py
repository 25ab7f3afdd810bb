"""From files to tensors: manifests, strict volumes, alignment, cache, synthetic cohort."""
