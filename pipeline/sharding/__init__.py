"""What happens to one unit of inputs: read, decode, judge, crop, write a tar."""
