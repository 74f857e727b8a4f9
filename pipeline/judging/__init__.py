"""How restored pictures are judged."""
