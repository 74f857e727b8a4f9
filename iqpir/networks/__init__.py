"""The networks of the method: pure ``nn.Module``s, built from one ``NetworkConfig``."""
