"""The parameters of layers that stay in host memory after a stage has left a device."""
