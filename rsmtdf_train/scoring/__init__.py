"""What is counted of a student's predictions beside the confusion matrix, and the pictures of it."""
