"""epmq"""
