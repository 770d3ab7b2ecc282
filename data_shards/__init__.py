"""Write, index and read samples in WebDataset shards, in an exact order."""

if __name__ == "data_shards":
    from deepskip.old_names import alias

    alias(__name__)
