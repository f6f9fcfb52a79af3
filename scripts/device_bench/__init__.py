"""scripts/gpu: saves and loads of device tensors, checked and measured on one device."""
