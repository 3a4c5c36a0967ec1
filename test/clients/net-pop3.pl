# Net::POP3's scenario: net-pop3.pl PORT NAME SECRET DIRECTORY pass|apop keep|delete
# Puts message N into DIRECTORY/N; what the replies said goes to standard output, a line each.
use strict;
use warnings;
use Net::POP3;

my ($port, $name, $secret, $directory, $login, $what) = @ARGV;
my $pop = Net::POP3->new('127.0.0.1', Port => $port, Timeout => 60) or die "no line: $@";
my $count = $login eq 'apop' ? $pop->apop($name, $secret) : $pop->login($name, $secret);
defined $count or die 'login: ' . $pop->message;
my ($n, $size) = $pop->popstat;
print "login ", $count + 0, "\nstat $n $size\nlast ", $pop->last + 0, "\n";
my $list = $pop->list or die 'list';
my $uidl = $pop->uidl or die 'uidl';
for my $i (sort { $a <=> $b } keys %$list) {
	$pop->list($i) == $list->{$i} or die "list $i";
	$pop->uidl($i) eq $uidl->{$i} or die "uidl $i";
	my $top = $pop->top($i, 0) or die "top $i";
	print "message $i $list->{$i} $uidl->{$i} ", length join('', @$top), "\n";
	open my $file, '>:raw', "$directory/$i" or die $!;
	$pop->get($i, $file) or die "get $i";
	close $file or die $!;
}
$pop->delete(1) or die 'delete';
$pop->reset;     # has no result
$pop->get(1000) and die 'a message that is not there';
print 'error ', $pop->message;
if ($what eq 'delete') {
	$pop->delete($_) or die "delete $_" for keys %$list;
}
$pop->quit or die 'quit';
