"""A Ray cluster, brought up and down."""

if __name__ == "cluster":
    from deepskip.old_names import alias

    alias(__name__)
