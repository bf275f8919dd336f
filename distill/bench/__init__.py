"""What a student costs in use, against its teacher: times in paired rounds, indexes, quality."""
