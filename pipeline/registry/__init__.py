"""The registered model: how it is packed, checked in a clean process, and compared."""
