# Sourced by the other scripts before anything else: --help prints the comment at their head.
case " $* " in
  *" --help "* | *" -h "*) sed -n '2,/^[^#]/ s/^# \{0,1\}//p' "$0" && exit ;;
esac
