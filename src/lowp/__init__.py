"""lowp"""
