"""A wanted quality for any ``nn.Module``, added from outside.

``place`` finds where in a host a quality can enter, ``attached_prior`` puts it there, ``fine_tuning`` teaches it.
"""
