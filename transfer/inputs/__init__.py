"""What people have: photos, folders, lists, piles and corrections, read and checked."""
