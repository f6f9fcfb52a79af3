"""What the user hands over and gets back: flattened, captured, matched and rebuilt."""
