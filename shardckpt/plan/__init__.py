"""Who writes what, who reads what, what goes where: numbers only, without I/O or clock."""
