"""The layers of a network: specs (plain data) and modules (parameters)."""
