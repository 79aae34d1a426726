"""What every room uses: arrays, validated settings, the way to the device."""
