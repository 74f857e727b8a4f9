"""Where pictures come from: folders, lists of addresses, tars and Parquet files.

``find`` lists what there is to plan, without pixels; ``reading`` fetches the bytes of one planned input, where the
unit is worked on.
"""
