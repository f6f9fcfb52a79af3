"""All talk between ranks: one Protocol, and what implements it."""
