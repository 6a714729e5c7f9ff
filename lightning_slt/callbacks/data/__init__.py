"""What a monitor makes of the data that a trainer trains on: minibatches for its chains, and single samples."""
