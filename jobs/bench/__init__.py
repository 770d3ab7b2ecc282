"""What a training costs around its network, measured."""
