"""Who writes what, who reads what, what goes where: pure, without I/O, ranks or clock."""
