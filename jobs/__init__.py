"""Jobs that a person or `ray job submit` starts: train, evaluate, predict, export, serve, compare, submit."""

if __name__ == "jobs":
    from deepskip.old_names import alias

    alias(__name__)
