"""`truthgpt tune`: finds the batching settings of a model by measuring, and writes them into its config.pbtxt.

    knobs      what can be set, and which values are worth a try
    scratch    a Triton of its own to measure on, never the served one
    rig        one candidate there: served, put under load, its figures
    search     which candidate is next
    history    what was measured before
    choosing   which candidates are the best, and whether one is better than what is set
    tuning     all of that in order
    editing    config.pbtxt with other values, every other byte as it was
    applying   the new file takes the place of the old one, the served model is reloaded, all or nothing; undo
    guard      the process that undoes it where the one that was at it was killed
"""
