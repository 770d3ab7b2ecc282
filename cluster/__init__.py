"""Start and stop Ray clusters, and model how a training scales on them."""

if __name__ == "cluster":
    from deepskip.old_names import alias

    alias(__name__)
