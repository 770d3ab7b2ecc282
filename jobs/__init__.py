"""What a person or `ray job submit` starts."""

if __name__ == "jobs":
    from deepskip.old_names import alias

    alias(__name__)
