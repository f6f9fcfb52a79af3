"""Messages between ranks: the Coordinator, and its implementations."""
