"""The protocol that makes a corpus exactly once: plan, units, commit records, seal, proof (docs/reliability.md)."""
