"""Edits that first learn the facts better: WHP and task vectors."""
