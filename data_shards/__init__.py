"""Samples in WebDataset shards: written, indexed, read in an exact order."""

if __name__ == "data_shards":
    from deepskip.old_names import alias

    alias(__name__)
