"""Everything that touches storage, a cluster or a server: corpora, labels, training runs, the registry.

Built on ``iqpir`` (the method) and used by ``jobs`` (one script a verb), never the other way round.
"""
