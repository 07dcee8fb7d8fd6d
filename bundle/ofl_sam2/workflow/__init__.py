"""What the bundle's configs name: network, inferer, files, data, metrics and trainer, as MONAI expects them."""
