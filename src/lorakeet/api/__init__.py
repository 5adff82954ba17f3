"""The Python interface: every verb of the command line is one function here.

    training    train, resume            recipe -> adapter in a run folder
    planning    plan, check_data         what would happen, without a model
    evaluation  evaluate                 base against tuned, on questions with answers
    shipping    export_merged, serve     one model on disk, or many adapters over HTTP

Each function joins floors below it and holds no mathematics of its own.
"""
