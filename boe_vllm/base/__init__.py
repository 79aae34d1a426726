"""What every room uses: arrays, validated settings, clocks."""
